"""The paper's ablations as rows of one table: python -m ablations components."""

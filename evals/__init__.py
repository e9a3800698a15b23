"""The paper's evaluations of frozen and fine-tuned networks: python -m evals.linear ..."""

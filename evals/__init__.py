"""The paper's evaluations of frozen and fine-tuned networks, a command each: python -m evals.linear."""

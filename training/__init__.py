"""What train.py leans on: its inputs, checkpoints, the state of a run, reports, backbones."""

"""What train.py leans on: checkpoints, the state of a run, its report, networks by name, and the losses of Table 7."""

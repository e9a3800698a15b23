"""Where and how a program runs, which knows nothing of DINO: processes, devices, command lines, order of images."""

"""Where and how a program runs: processes, devices, flags. It knows nothing of DINO."""

"""What the method needs but is no part of it: processes, devices, flags, pixels, drawings."""

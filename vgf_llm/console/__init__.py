"""What people see: lines and bars on the screen, everybody else's noise in a log, data alone on standard output."""

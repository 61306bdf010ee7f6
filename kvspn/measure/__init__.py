"""What steps and ops cost here: timed in turn, checked, and put beside other runtimes and a bare read."""

"""What every script needs and no reader of the method must open: command line, processes, the run, its files, log and pictures."""

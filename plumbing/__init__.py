"""What scripts need and no reader of the method must open: command line, processes, the run, its files and plots."""

"""Support for the scripts, not needed to understand the method: command line, processes, runs, files and plots."""

"""What the scripts share: start, folder and results of a run, downstream runs, monitors, publishing."""

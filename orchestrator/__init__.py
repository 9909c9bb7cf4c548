"""The sweep: driver, workers, measurement store, study, tracking."""

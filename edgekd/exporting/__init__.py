"""Programs to proven files: written by an exporter, run, compared, or refused."""

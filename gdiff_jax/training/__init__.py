"""Training of priors and of victims, from settings; each run goes to a folder."""

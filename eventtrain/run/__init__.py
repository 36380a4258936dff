"""One fit, validate, test or predict, from setup to teardown."""

"""One file an op: formula, checks, plain reference, registration, CPU call."""

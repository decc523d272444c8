"""One definition of a feature for training, batch and look-up; the only code that knows Feast."""

"""Evaluation: the test split answered and scored, the tuned model beside its base."""

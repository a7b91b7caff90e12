"""Scored responses: which scorers share a pass, and what is read off the scores."""

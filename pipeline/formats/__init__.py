"""The tilt in the formats of other trainers: one file each, and one row each in ``all_formats.py``.

Every format is made from the hand-off table, so its rows carry what stage 1 found: with s = (r + <lam*, g - b>) / beta
the score of a response in nats, the tilted policy is proportional to pi_ref exp(s).
"""

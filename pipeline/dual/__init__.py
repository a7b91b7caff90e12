"""From scored responses to a certified solution and its frontier, in the user's own directions and units."""

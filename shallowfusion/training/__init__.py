"""Numbers that are learnt or chosen on development data: temperatures, gates, weights."""

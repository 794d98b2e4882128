"""Knowledge: what recognised bodies teach about each emergency, as cards, and how the fitting card is found offline."""

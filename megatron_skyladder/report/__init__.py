"""``skyladder report``: what one or more runs did, as one HTML page."""

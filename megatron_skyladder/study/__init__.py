"""``skyladder study``: a queue of small training runs, and the page that says what came out."""

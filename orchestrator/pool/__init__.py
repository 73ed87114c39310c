"""The pool: a queue of requests in front of the hosts or scorers that answer them, in-process or as Ray actors."""

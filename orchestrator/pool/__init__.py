"""The pool: a queue of requests in front of the hosts that answer them, in-process or as Ray actors.

In this package, a host is any actor that answers requests, so scorers are hosts, too.
"""

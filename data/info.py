def describe(*a, **k):
    raise ValueError

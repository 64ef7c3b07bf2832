import gc

# Each of a stage's half a dozen processes imports some thousands of modules, and with Python's own threshold of 700 new
# objects a quarter of that time is spent looking for garbage among them.
gc.set_threshold(100_000, 10, 10)

"""The stream: which samples an epoch trains on, in which order, on which rank, and how they become batches.

``bits`` holds the random bits, ``order`` the epoch order as pure functions, ``ahead`` says which shards come next,
``loader`` turns the order into batches, ``bad`` counts what could not be read. The first three need numpy alone.
``seeding`` is for libraries that draw from global generators. An epoch, rank 1 of 2, from its step 5 on, with any
number of loader workers:

    order = epoch_order(source.lengths, seed, epoch, window=16)
    positions = training_positions(len(order), batch=64, rank=1, world=2, pad=False)
    for batch in iterate(Batches(source, transform, positions, order, seed, epoch), 5, Loading(8, pin_memory=True)):
        ...
"""

"""The stream: the order of an epoch (``order``, which needs numpy alone) and its batches (``loader``).

The batches of rank 1 of 2 in an epoch, from step 5 on, the same for any number of loader workers:

    order = epoch_order(source.lengths, seed, epoch, window=16)
    positions = training_positions(len(order), batch=64, rank=1, world=2, pad=False)
    loader = epoch_loader(source, transform, positions, order, seed, epoch, start=5, workers=8)
    for step, batch in enumerate(loader, 5):
        ...
"""

"""From files to batches, one room after the other; imports run in that order only.

- ``sources``: files, folders and hub data sets, read in chunks and parsed into raw rows
- ``formats``: rows of each format (Alpaca, chat, prompt and completion …) into examples, which are turns or plain text
- ``templates``: examples into token ids and loss masks
- ``prepare``: all rows of a data set into a table on disk, by its fingerprint, with what is wrong with them
- ``mixture``, ``validation_split``, ``run_data``, ``load``, ``describe``: tables into the rows of a run
- ``batching``: a step's global batch, split over ranks, collated into micro-batches: padded rows, or tries of shared
  prefixes (sequence packing)
"""

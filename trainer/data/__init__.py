"""From files to batches. Data travels one way through these modules, and imports run in that order only:

- files to rows: ``rows``, ``readers``, ``arrays``, ``hub``, ``digests``, ``sources``
- rows to turns: ``turns``, ``fields``, ``chats``, ``formats``
- turns to token ids with a label mask: ``tokenise``, ``layouts``, ``rendering``, ``templates``
- ids to a table on disk: ``encode``, ``workers``, ``checks``, ``build``, ``prepare``
- tables to the examples of a run: ``mixture``, ``split``, ``load``
- examples to forwards: ``batches`` (with ``balance``), ``trie``, ``micro``, ``packing``
"""

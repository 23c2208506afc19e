"""What was lost, altered or set back, and what mends it.

a signature may be lost (disk, old backup, clone)    mark.py -> the next start: recovery.py,
                                                     which has gather.py, counting.py and waiting.py
a checkpoint here is gone or altered                 damage.py finds it -> mark.py
a peer's checkpoint is elsewhere, and not coming     fetch_missing.py
a fused model that people take results from is lost  fetch_models.py
a peer's list tells of a loss, here or there         set_back.py
a peer cannot be asked                               by_hand.py
"""

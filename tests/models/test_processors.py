import os
import threading

import torch

from rlhf_ray.models.processors import use_processors


def test_a_scorer_gives_way_once_however_often_it_is_set_up_and_its_heartbeat_does_not():
    seen = []

    def actor() -> None:
        for _ in range(2):
            use_processors(1)
        seen.append((os.getpriority(os.PRIO_PROCESS, 0), torch.get_num_threads()))

    thread = threading.Thread(target=actor)
    thread.start()
    thread.join()
    assert seen == [(19, 1)]
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19

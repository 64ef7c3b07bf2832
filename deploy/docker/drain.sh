#!/bin/sh
# Runs in every pod before it is stopped (preStop). The driver, which lives on the head, is told to save the last whole
# iteration and to end: PID 1 of a Ray pod would not pass SIGTERM on to it. Workers wait until the driver has ended their
# learners, because it takes living learners to save. terminationGracePeriodSeconds bounds all this.
pkill -TERM -f 'bin/rlhf-ray '
while pgrep -f 'bin/rlhf-ray |^ray::([A-Za-z]*Learner|(policy|critic|supervised)-[0-9])' > /dev/null; do sleep 1; done

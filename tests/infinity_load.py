"""Asks a server for scores from several threads without a pause: python infinity_load.py URL REQUESTS.json SECONDS

Prints the seconds of each request and the largest difference from the scores that were expected, as json.
"""

import json
import sys
import threading
import time
from pathlib import Path

import requests

THREADS = 4


def work(url, wanted, end, seconds, differences):
    session = requests.Session()
    for at in range(10**9):
        body, expected = wanted[at % len(wanted)]
        start = time.perf_counter()
        results = session.post(f"{url}/rerank", json=body, timeout=60).json()["results"]
        seconds.append(time.perf_counter() - start)
        differences.extend(abs(one["relevance_score"] - expected[one["index"]]) for one in results)
        if time.monotonic() > end:
            return


if __name__ == "__main__":
    url, wanted, duration = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), float(sys.argv[3])
    seconds, differences = [], []
    arguments = url, wanted, time.monotonic() + duration, seconds, differences
    threads = [threading.Thread(target=work, args=arguments) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"seconds": seconds, "difference": max(differences), "scores": len(differences)}))

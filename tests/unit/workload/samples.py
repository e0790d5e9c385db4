"""A small good file of every format that lists requests, as text, for tests that break it."""

import json
from pathlib import Path

from tests.command_line import write_journal

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2225670,879,55\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:00.017335+00:00,2399,6\n"
    "2024-05-10 00:00:01+00:00,76,15\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,230,1317,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)
BURSTGPT_SESSIONS = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5.0,u-1,3.25,ChatGPT,472,18,490,Conversation log\n"
    "45.125,,1.0,GPT-4,1087,230,1317,API log\n"
    "118,u-1,9,ChatGPT,417,276,693,Conversation log\n"
)
AGENTS = (
    "kind,session,call,t_rel_s,gap_since_prev_call_s,input_tokens,output_tokens,common_prefix_tokens_with_prev\n"
    "swe,06392522,0,0.0,0,1258,89,0\n"
    "swe,06392522,1,2.334,2.334,1273,200,1257\n"
    "tau,06392522,0,0.0,0,88,17,0\n"
    "tau,06392522,1,3.681,3.681,97,7,32\n"
)
SHAREGPT_LENGTHS = "conv,turn,ctx,new,reply\n0,0,0,24,255\n0,1,279,50,3\n1,0,0,433,550\n"
MOONCAKE = (
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3000, "input_length": 512, "output_length": 7, "hash_ids": [0]}\n'
    '{"timestamp": 3000, "input_length": 1025, "output_length": 70, "hash_ids": [0, 2, 3]}\n'
)
ROTA = (
    '{"format":"rota-trace","version":1}\n'
    '{"at":0,"num_prompt_tokens":40,"num_output_tokens":5,"prefix_hashes":[7,8],"hash_block_tokens":16,"id":"a"}\n'
    '{"at":2000,"num_prompt_tokens":64,"num_output_tokens":1,"id":"b","after":["a"],"gap":2000}\n'
    '{"at":900,"num_prompt_tokens":9,"num_output_tokens":9,"session":"s","tenant":"t","priority":-1}\n'
)
SHAREGPT = json.dumps(
    [
        {
            "id": "a",
            "conversations": [
                {"from": "human", "value": "How do I sort a list, \"in place\"?"},
                {"from": "gpt", "value": "Call its sort method: [3, 1].sort() {returns nothing}."},
                {"from": "human", "value": "Thanks."},
                {"from": "gpt", "value": "You are welcome."},
            ],
        },
        {"id": "b", "conversations": [{"from": "human", "value": "Grüße"}, {"from": "gpt", "value": "Hallo ☺"}]},
    ],
    ensure_ascii=False,
    indent=1,
)  # fmt: skip

TEXTS = {
    "azure": AZURE,
    "azure 2024": AZURE_2024,
    "burstgpt": BURSTGPT,
    "burstgpt with sessions": BURSTGPT_SESSIONS,
    "agents": AGENTS,
    "sharegpt lengths": SHAREGPT_LENGTHS,
    "mooncake": MOONCAKE,
    "rota": ROTA,
    "sharegpt": SHAREGPT,
}
LINES_BEFORE_ROWS = {
    "azure": 1,
    "azure 2024": 1,
    "burstgpt": 1,
    "burstgpt with sessions": 1,
    "agents": 1,
    "sharegpt lengths": 1,
    "mooncake": 0,
    "rota": 1,
}
"""Of the formats whose rows are lines."""


def journal_bytes(folder: Path) -> bytes:
    """A journal in which every request ends well."""
    path = folder / "whole.journal"
    write_journal(path, faults=())
    return path.read_bytes()

"""What the dashboards show: titles, questions, queries. `python -m deploy.dashboards` makes Grafana's files of it."""

from collections.abc import Mapping, Sequence

from deploy.panels import Panel, Row, mean, quantile, quantiles, rate

_ALL = '{instance=~"$instance"}'
_SERVER_ERRORS = 'status="5xx"'

SERVICE = [
    Row(
        "State",
        [
            Panel("Ready", "Can it generate?", "bool_on_off", {"{{instance}}": f"fused_ready{_ALL}"}, "stat", 6),
            Panel(
                "Engine", "Do its processes live?", "bool_on_off", {"{{instance}}": f"fused_engine_up{_ALL}"}, "stat", 6
            ),
            Panel(
                "What is served",
                "Version, model and gate; replicas should show the same.",
                "none",
                {
                    "{{version}} (vLLM {{vllm_version}}) {{model_name}} {{gate_sha256}}": (
                        f"sum by (version, vllm_version, model_name, gate_sha256) (fused_build_info{_ALL})"
                    )
                },
                "stat",
                12,
            ),
        ],
    ),
    Row(
        "Traffic",
        [
            Panel(
                "Requests", "HTTP requests a second.", "reqps", {"{{status}}": rate("http_requests_total", "status")}
            ),
            Panel(
                "Tokens",
                "A second; prompt tokens are those of the longest of a request's prompts.",
                "short",
                {"prompt": rate("vllm:prompt_tokens_total"), "generated": rate("vllm:generation_tokens_total")},
            ),
            Panel(
                "Requests in the engine",
                "Running ones share every step; waiting ones have not begun. Both stand still while the engine hangs;"
                " unfinished ones are counted before it.",
                "short",
                {
                    "running": f"sum (vllm:num_requests_running{_ALL})",
                    "waiting": f"sum (vllm:num_requests_waiting{_ALL})",
                    "unfinished": f"sum (fused_unfinished_requests{_ALL})",
                },
            ),
        ],
    ),
    Row(
        "Latency",
        [
            Panel(
                "Time to first token",
                "Waiting and reading the prompt.",
                "s",
                quantiles("vllm:time_to_first_token_seconds"),
            ),
            Panel(
                "Time between tokens",
                "What a reader of a stream feels. With speculation: between steps, each of which may give several.",
                "s",
                quantiles("vllm:inter_token_latency_seconds"),
            ),
            Panel("Whole request", "From arrival to end.", "s", quantiles("vllm:e2e_request_latency_seconds")),
            Panel("Time in the queue", "Waiting alone.", "s", quantiles("vllm:request_queue_time_seconds")),
        ],
    ),
    Row(
        "Errors",
        [
            Panel(
                "5xx",
                "Share of requests. Alert: above 1 % for five minutes.",
                "percentunit",
                {"5xx": f"{rate('http_requests_total', labels=_SERVER_ERRORS)} / {rate('http_requests_total')}"},
            ),
            Panel(
                "Turned away",
                "A second, by reason: load, limits, keys, shutdown.",
                "reqps",
                {"{{reason}}": rate("fused_rejections_total", "reason")},
            ),
            Panel(
                "Ends",
                "Why responses ended.",
                "reqps",
                {
                    "{{finished_reason}}": rate("vllm:request_success_total", "finished_reason"),
                    "client left": rate("fused_client_disconnects_total"),
                },
            ),
            Panel(
                "Not fused",
                "Requests that asked for what a fused model cannot do, by field.",
                "reqps",
                {"{{param}}": rate("fused_refused_requests_total", "param")},
            ),
        ],
    ),
    Row(
        "Saturation",
        [
            Panel(
                "KV cache in use",
                "Full: requests are preempted.",
                "percentunit",
                {"{{instance}}": f"vllm:kv_cache_usage_perc{_ALL}"},
            ),
            Panel(
                "Preemptions",
                "Requests thrown back into the queue, a second.",
                "reqps",
                {"{{instance}}": rate("vllm:num_preemptions_total", "instance")},
            ),
            Panel(
                "Prefix cache",
                "Share of prompt tokens that need not be computed again.",
                "percentunit",
                {"hits": f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}"},
            ),
            Panel(
                "CPU of the API process",
                "Near 1, a second server serves more than a bigger GPU.",
                "short",
                {"{{instance}}": rate("process_cpu_seconds_total", "instance")},
            ),
            Panel(
                "Memory of the API process",
                "Resident.",
                "bytes",
                {"{{instance}}": f"process_resident_memory_bytes{_ALL}"},
            ),
            Panel(
                "Age of the engine's last step",
                "With requests in the engine, above a minute it has stalled.",
                "s",
                {"{{instance}}": f"time() - (fused_last_step_timestamp_seconds{_ALL} > 0)"},
            ),
        ],
    ),
]

_FORWARD = "fused_specialist_forward_seconds"
_IDLE = "fused_specialist_idle_seconds"
_FUSING = rate("fused_overhead_seconds_sum")
_DRAFTS = rate("fused_draft_tokens_total", "drafter")

FUSION = [
    Row(
        "The gate",
        [
            Panel(
                "Mean weight",
                "Each specialist's share of the mixture.",
                "percentunit",
                {"{{specialist}}": mean("fused_gate_weight_ratio", "specialist")},
                is_stacked=True,
            ),
            Panel(
                "Leads",
                "Share of tokens at which a specialist has the largest weight.",
                "percentunit",
                {
                    "{{specialist}}": (
                        f"{rate('fused_gate_top_specialist_total', 'specialist')}"
                        f" / ignoring (specialist) group_left () {rate('fused_gate_top_specialist_total')}"
                    )
                },
                is_stacked=True,
            ),
            Panel(
                "Entropy of the weights",
                "0: one specialist decides; 1: all count the same.",
                "percentunit",
                {"mean": mean("fused_gate_entropy_ratio")},
            ),
            Panel(
                "Weights over time",
                "How often each weight occurs, all specialists together.",
                "percentunit",
                {"{{le}}": rate("fused_gate_weight_ratio_bucket", "le")},
                "heatmap",
                12,
            ),
            Panel(
                "Entropy over time",
                "How often each entropy occurs.",
                "percentunit",
                {"{{le}}": rate("fused_gate_entropy_ratio_bucket", "le")},
                "heatmap",
                12,
            ),
        ],
    ),
    Row(
        "What mixing does",
        [
            Panel(
                "Agreement",
                "Share of tokens for which so many specialists prefer the same one: fusing can only help elsewhere.",
                "percentunit",
                {
                    "{{agreeing}} agree": (
                        f"{rate('fused_specialist_agreement_total', 'agreeing')}"
                        f" / ignoring (agreeing) group_left () {rate('fused_specialist_agreement_total')}"
                    )
                },
                is_stacked=True,
            ),
            Panel(
                "Overridden",
                "Share of tokens for which the mixture prefers another than the leading specialist does.",
                "percentunit",
                {"overridden": (f"{rate('fused_tokens_overridden_total')} / {rate('fused_gate_entropy_ratio_count')}")},
            ),
            Panel(
                "Not finite",
                "Requests ended since values were NaN or infinite, by whose they were.",
                "short",
                {"{{source}}": f"sum by (source) (increase(fused_nonfinite_total{_ALL}[$__range]))"},
                "stat",
            ),
        ],
    ),
    Row(
        "Running ahead",
        [
            Panel(
                "Tokens a round",
                "What a request is given in a step: 1 where no draft holds; empty without speculation.",
                "short",
                {"mean": mean("fused_tokens_per_round")},
            ),
            Panel(
                "Drafts that held",
                "Share of those verified, by who made them. Alert: below a fifth for half an hour.",
                "percentunit",
                {"{{drafter}}": f"{rate('fused_accepted_tokens_total', 'drafter')} / {_DRAFTS}"},
            ),
            Panel("Drafts", "Verified a second, by who made them.", "short", {"{{drafter}}": _DRAFTS}),
            Panel(
                "Drafts a round",
                "How often each number was taken for a request and step; in the bucket 0 it had none.",
                "short",
                {"{{le}}": rate("fused_drafts_per_round_bucket", "le")},
                "heatmap",
                12,
            ),
            Panel(
                "Rounds without a draft",
                "Share of rounds, by the reason.",
                "percentunit",
                {
                    "{{reason}}": (
                        f"{rate('fused_undrafted_requests_total', 'reason')}"
                        f" / ignoring (reason) group_left () {rate('fused_drafts_per_round_count')}"
                    )
                },
                width=12,
                is_stacked=True,
            ),
        ],
    ),
    Row(
        "What it costs",
        [
            Panel(
                "Forward pass, decoding",
                "Median by specialist: the parts of a step.",
                "s",
                {"{{specialist}}": quantile(0.5, _FORWARD, "specialist", 'phase="decode"')},
                is_stacked=True,
            ),
            Panel(
                "Forward pass, reading prompts",
                "p95 by specialist.",
                "s",
                {"{{specialist}}": quantile(0.95, _FORWARD, "specialist", 'phase="prefill"')},
            ),
            Panel(
                "Gate and mixing",
                "Mean time of a step.",
                "s",
                {"{{part}}": mean("fused_overhead_seconds", "part")},
                is_stacked=True,
            ),
            Panel(
                "Idle specialists",
                "Share of their time in which specialists with devices of their own wait for others.",
                "percentunit",
                {
                    "{{specialist}}": (
                        f"{rate(f'{_IDLE}_sum', 'specialist')} / "
                        f"({rate(f'{_IDLE}_sum', 'specialist')} + {rate(f'{_FORWARD}_sum', 'specialist')})"
                    )
                },
            ),
            Panel(
                "Share of fusing",
                "Time of gate and mixing, of all measured time.",
                "percentunit",
                {"share": f"{_FUSING} / ({_FUSING} + {rate(f'{_FORWARD}_sum')})"},
            ),
            Panel(
                "Steps",
                "A second.",
                "short",
                {"{{instance}}": rate("fused_overhead_seconds_count", "instance", 'part="mix"')},
            ),
        ],
    ),
]

DASHBOARDS: Mapping[str, tuple[str, Sequence[Row]]] = {
    "service": ("UltraFuser: service", SERVICE),
    "fusion": ("UltraFuser: fusion", FUSION),
}
"""Title and rows by file name."""

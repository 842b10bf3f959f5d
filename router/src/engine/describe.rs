//! The engine's metrics: names, units and what they mean.

/// Describes the engine's metrics; call it once, after the recorder is installed.
pub fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_counter!("herd_steps_total", Unit::Count, "Steps that committed.");
    describe_histogram!("herd_step_seconds", Unit::Seconds, "Time of a step over all ranks.");
    describe_counter!("herd_tokens_generated_total", Unit::Count, "Tokens sampled.");
    describe_counter!(
        "herd_tokens_prefilled_total",
        Unit::Count,
        "Tokens computed without sampling after them."
    );
    describe_gauge!("herd_streams", Unit::Count, "Live sequences, waiting ones included.");
    describe_gauge!("herd_queue", Unit::Count, "Sequences that wait for a rank.");
    describe_counter!(
        "herd_preemptions_total",
        Unit::Count,
        "Sequences that gave their memory back to an older one."
    );
    describe_gauge!("herd_kv_blocks_free", Unit::Count, "Free KV blocks of a rank's pool.");
    describe_counter!("herd_requests_total", Unit::Count, "Sequences by how they ended.");
}

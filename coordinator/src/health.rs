//! How the members' GPUs are, as far as they have told lately. It has no clock.

use ids::WorkerId;
use proto::pb;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// Workers tell every second. What is older than some of these says nothing of now, and is not shown.
const FRESH: Duration = Duration::from_secs(10);

/// By worker: when it told, and what. Times are those of one clock that only goes forward.
#[derive(Debug, Default)]
pub(crate) struct Healths(BTreeMap<WorkerId, (Duration, Value)>);

impl Healths {
    /// Takes a report in, and forgets those that are old.
    pub(crate) fn add(&mut self, now: Duration, health: pb::GpuHealth) {
        self.0.retain(|_, (at, _)| now.saturating_sub(*at) < FRESH);
        self.0.insert(WorkerId(health.worker), (now, json(health)));
    }

    /// What a worker has told lately.
    pub(crate) fn of(&self, worker: WorkerId, now: Duration) -> Option<&Value> {
        let (at, health) = self.0.get(&worker)?;
        (now.saturating_sub(*at) < FRESH).then_some(health)
    }
}

/// Only what the GPU tells has a field.
fn json(health: pb::GpuHealth) -> Value {
    let pb::GpuHealth {
        worker: _,
        memory_used,
        memory_total,
        sm_mhz,
        memory_mhz,
        temperature_c,
        ecc_uncorrected,
        last_xid,
        throttle,
    } = health;
    let told = [
        ("memory_used_bytes", memory_used.map(Value::from)),
        ("memory_total_bytes", memory_total.map(Value::from)),
        ("sm_mhz", sm_mhz.map(Value::from)),
        ("memory_mhz", memory_mhz.map(Value::from)),
        ("temperature_c", temperature_c.map(Value::from)),
        ("ecc_uncorrected", ecc_uncorrected.map(Value::from)),
        ("last_xid", last_xid.map(Value::from)),
        ("throttle", (!throttle.is_empty()).then(|| json!(throttle))),
    ];
    let fields = told.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(fields.collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_told_lately_is_shown() {
        let mut healths = Healths::default();
        let health = |worker| pb::GpuHealth { worker, sm_mhz: Some(1980), ..Default::default() };
        let at = Duration::from_secs;
        healths.add(at(1), health(4));
        healths.add(at(5), health(5));
        let of = |healths: &Healths, worker, now| healths.of(WorkerId(worker), at(now)).cloned();
        assert_eq!(of(&healths, 4, 10), Some(json!({ "sm_mhz": 1980 })));
        assert_eq!(of(&healths, 4, 11), None, "too old");
        assert_eq!(of(&healths, 6, 5), None, "never told");
        healths.add(at(12), health(6));
        assert_eq!(healths.0.len(), 2, "what is old is forgotten");
    }
}

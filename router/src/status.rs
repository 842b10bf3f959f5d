//! The cluster's part of `/status`, asked of the coordinator.

use crate::http::ClusterStatus;
use proto::pb;
use serde_json::{Value, json};
use std::time::Duration;
use tonic::transport::Endpoint;

/// Longest wait for the coordinator's answer.
const CALL_MAX: Duration = Duration::from_secs(2);

/// Asks the coordinators of `http://host:port[,http://…]` in turn; if none answers, says so in
/// `coordinator_error`, because the router serves without them.
#[must_use]
pub fn of_coordinators(coordinators: &str) -> ClusterStatus {
    let urls: Vec<String> = coordinators.split(',').map(str::to_owned).collect();
    Box::new(move || {
        let urls = urls.clone();
        Box::pin(async move {
            let mut last = "there is no coordinator to ask".to_owned();
            for url in urls {
                match ask(url).await {
                    Ok(status) => return status,
                    Err(error) => last = error.to_string(),
                }
            }
            json!({ "coordinator_error": last })
        })
    })
}

async fn ask(url: String) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
    let endpoint = Endpoint::from_shared(url)?.connect_timeout(CALL_MAX).timeout(CALL_MAX);
    let channel = endpoint.connect().await?;
    let mut client = pb::coordinator_client::CoordinatorClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
    let answer = client.status(pb::StatusRequest {}).await?.into_inner();
    Ok(serde_json::from_str(&answer.json)?)
}

/// Joins what the coordinator and the router know: the router tells which rank runs how many
/// sequences.
#[must_use]
pub(crate) fn join(mut cluster: Value, router: Value, sequences: &[u32]) -> Value {
    if !cluster.is_object() {
        cluster = json!({ "cluster": cluster });
    }
    for member in cluster.get_mut("members").and_then(Value::as_array_mut).into_iter().flatten() {
        let rank = member["rank"].as_u64().and_then(|rank| usize::try_from(rank).ok());
        member["sequences"] = json!(rank.and_then(|rank| sequences.get(rank)));
    }
    cluster["router"] = router;
    cluster
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_learn_their_sequences_by_rank() {
        let cluster = json!({ "members": [{ "rank": 1 }, { "rank": null }, { "rank": 7 }] });
        let joined = join(cluster, json!({ "pid": 3 }), &[4, 5]);
        let want = json!({
            "members": [
                { "rank": 1, "sequences": 5 },
                { "rank": null, "sequences": null },
                { "rank": 7, "sequences": null },
            ],
            "router": { "pid": 3 },
        });
        assert_eq!(joined, want);
    }

    #[tokio::test]
    async fn absent_coordinator_is_named_and_harms_nothing() {
        let status = of_coordinators("http://127.0.0.1:9")().await;
        assert!(status["coordinator_error"].is_string(), "{status}");
    }
}

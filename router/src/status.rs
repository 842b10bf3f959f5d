//! The cluster's part of `/status`, asked of the coordinator.

use crate::engine::{EngineHandle, RankLoad};
use crate::http::ClusterStatus;
use futures::future::join_all;
use proto::pb;
use serde_json::{Value, json};
use std::time::Duration;
use tonic::transport::Endpoint;

/// Longest wait for a coordinator's answer: whoever asks for the status does so because something
/// may be wrong, and shall not wait for what is.
const CALL_MAX: Duration = Duration::from_secs(1);

/// Asks the coordinators of `http://host:port[,http://…]` at once; if none leads, says so in
/// `coordinator_error`, because the router serves without them.
#[must_use]
pub fn of_coordinators(coordinators: &str) -> ClusterStatus {
    let urls: Vec<String> = coordinators.split(',').map(str::to_owned).collect();
    Box::new(move || {
        let urls = urls.clone();
        Box::pin(async move {
            let answers = join_all(urls.iter().map(|url| ask(url.clone()))).await;
            merge(urls.into_iter().zip(answers.into_iter().map(|a| a.map_err(|e| e.to_string()))))
        })
    })
}

/// The leader's document, with a line for every coordinator.
fn merge(answers: impl Iterator<Item = (String, Result<Value, String>)>) -> Value {
    let (mut document, mut coordinators, mut last) = (None, Vec::new(), None);
    for (url, answer) in answers {
        match answer {
            Ok(status) => {
                coordinators
                    .extend(status["coordinators"].as_array().into_iter().flatten().cloned());
                if status["coordinators"][0]["leader"] == true {
                    document = Some(status);
                }
            }
            Err(error) => {
                coordinators.push(json!({ "url": url, "leader": false, "error": error }));
                last = Some(format!("{url}: {error}"));
            }
        }
    }
    let nobody = || {
        let error = last.unwrap_or_else(|| "no coordinator leads".into());
        json!({ "coordinator_error": error })
    };
    let mut document = document.unwrap_or_else(nobody);
    // The leader first: those who look for it need not search.
    coordinators.sort_by_key(|coordinator| coordinator["leader"] != true);
    document["coordinators"] = Value::Array(coordinators);
    document
}

async fn ask(url: String) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
    let endpoint = Endpoint::from_shared(url)?.connect_timeout(CALL_MAX).timeout(CALL_MAX);
    let channel = endpoint.connect().await?;
    let mut client = pb::coordinator_client::CoordinatorClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
    // The endpoint's limit is only told to the server, which may be frozen.
    let answer = tokio::time::timeout(CALL_MAX, client.status(pb::StatusRequest {})).await;
    let answer = answer.map_err(|_| format!("no answer within {CALL_MAX:?}"))??.into_inner();
    Ok(serde_json::from_str(&answer.json)?)
}

/// Joins what the coordinator and the router know: the router tells which rank runs how many
/// sequences, and who serves if no coordinator can.
#[must_use]
pub(crate) fn join(mut cluster: Value, engine: &EngineHandle) -> Value {
    if !cluster.is_object() {
        cluster = json!({ "cluster": cluster });
    }
    if cluster["members"].is_null() {
        let (epoch, members) = engine.members_json();
        cluster["epoch"] = json!(epoch);
        cluster["members"] = members;
    }
    with_load(cluster, engine.status_json(), &engine.load_by_rank())
}

fn with_load(mut cluster: Value, router: Value, load: &[RankLoad]) -> Value {
    for member in cluster.get_mut("members").and_then(Value::as_array_mut).into_iter().flatten() {
        let rank = member["rank"].as_u64().and_then(|rank| usize::try_from(rank).ok());
        let load = rank.and_then(|rank| load.get(rank));
        member["sequences"] = json!(load.map(|load| load.sequences));
        member["backup_tokens"] = json!(load.map(|load| load.backup_tokens));
    }
    cluster["router"] = router;
    cluster
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_learn_their_load_by_rank() {
        let cluster = json!({ "members": [{ "rank": 1 }, { "rank": null }, { "rank": 7 }] });
        let load = |sequences| RankLoad { sequences, backup_tokens: 10 * u64::from(sequences) };
        let joined = with_load(cluster, json!({ "pid": 3 }), &[load(4), load(5)]);
        let want = json!({
            "members": [
                { "rank": 1, "sequences": 5, "backup_tokens": 50 },
                { "rank": null, "sequences": null, "backup_tokens": null },
                { "rank": 7, "sequences": null, "backup_tokens": null },
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

    #[test]
    fn leader_speaks_and_every_coordinator_has_a_line() {
        let answer = |url: &str, leader: bool| {
            let line = json!({ "url": url, "leader": leader });
            (url.to_owned(), Ok(json!({ "epoch": 3, "coordinators": [line] })))
        };
        let dead = ("c".to_owned(), Err("gone".to_owned()));
        let merged = merge([dead.clone(), answer("a", false), answer("b", true)].into_iter());
        let lines = json!([
            { "url": "b", "leader": true },
            { "url": "c", "leader": false, "error": "gone" },
            { "url": "a", "leader": false },
        ]);
        assert_eq!(merged, json!({ "epoch": 3, "coordinators": lines }));
        let merged = merge([answer("a", false)].into_iter());
        assert_eq!(merged["coordinator_error"], "no coordinator leads");
        assert_eq!(merge([dead].into_iter())["coordinator_error"], "c: gone");
    }
}

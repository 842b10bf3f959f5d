//! A server over a fake cluster, and an HTTP client that hides nothing: bytes over TCP.

use crate::engine::{self, EngineConfig, EngineHandle, tests::fake::Cluster};
use crate::http::{Front, ServedModel, serve};
use futures::FutureExt;
use serde_json::{Value, json};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Nothing here should take a second; a hang must fail instead.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Server {
    pub(super) cluster: Cluster,
    pub(super) engine: EngineHandle,
    pub(super) served: Arc<ServedModel>,
    address: String,
}

impl Server {
    /// Over a cluster of one rank that serves.
    pub(super) async fn ready() -> Self {
        let server = Self::start(64).await;
        server.cluster.publish(1, 1, 64);
        server.until("ready", |engine| engine.is_ready()).await;
        server
    }

    /// Over a cluster without a view.
    pub(super) async fn start(queue_max: u32) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/toy-maverick");
        Self::over(ServedModel::load(&dir, "org/toy".into()).unwrap(), queue_max).await
    }

    pub(super) async fn over(served: ServedModel, queue_max: u32) -> Self {
        let cluster = Cluster::start(1).await;
        let engine = engine::start(EngineConfig {
            coordinator: cluster.coordinator.clone(),
            address: "127.0.0.1:1".into(),
            step_tokens: 24,
            prefill_max: Duration::from_millis(100),
            sequences_max: 2,
            queue_max,
            step_deadline: Duration::from_secs(5),
        });
        let served = Arc::new(served);
        let front = Front {
            model: served.clone(),
            metrics: Box::new(|| panic!("planted")),
            status: Box::new(|| async { json!({ "workers": [] }) }.boxed()),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let served_engine = engine.clone();
        telemetry::spawn("http", async move {
            serve(listener, front, served_engine, std::future::pending()).await.unwrap();
        });
        Self { cluster, engine, served, address }
    }

    pub(super) async fn until(&self, what: &str, mut is_so: impl FnMut(&EngineHandle) -> bool) {
        let wait = async {
            while !is_so(&self.engine) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    pub(super) async fn get(&self, path: &str) -> Reply {
        self.request("GET", path, b"").await
    }

    pub(super) async fn post(&self, path: &str, body: Value) -> Reply {
        self.request("POST", path, body.to_string().as_bytes()).await
    }

    pub(super) async fn request(&self, method: &str, path: &str, body: &[u8]) -> Reply {
        let connection = self.send(method, path, body).await;
        let read = tokio::time::timeout(PATIENCE, Reply::read(connection));
        read.await.unwrap_or_else(|_| panic!("no answer to {method} {path}"))
    }

    /// Sends a request and leaves its answer to the caller.
    pub(super) async fn send(&self, method: &str, path: &str, body: &[u8]) -> TcpStream {
        let mut connection = TcpStream::connect(&self.address).await.unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n"
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        // A server that refuses a long body may close before it has it all.
        let _refused = connection.write_all(body).await;
        connection
    }
}

pub(super) struct Reply {
    pub(super) status: u16,
    /// In lower case.
    pub(super) head: String,
    pub(super) body: String,
}

impl Reply {
    async fn read(mut connection: TcpStream) -> Self {
        let mut bytes = Vec::new();
        // A reset after the answer loses nothing of it.
        let _reset = connection.read_to_end(&mut bytes).await;
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let head = head.to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let is_chunked = head.contains("transfer-encoding: chunked");
        let body = if is_chunked { joined(body) } else { body.to_owned() };
        Self { status, head, body }
    }

    #[track_caller]
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.body))
    }

    /// The events of a stream that ends as it should.
    #[track_caller]
    pub(super) fn events(&self) -> Vec<Value> {
        assert!(self.head.contains("content-type: text/event-stream"), "{}", self.head);
        let mut events: Vec<&str> = self.body.split_terminator("\n\n").collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", self.body);
        let data = |event: &&str| serde_json::from_str(event.strip_prefix("data: ").unwrap());
        events.iter().map(|event| data(event).unwrap()).collect()
    }
}

/// The chunks of a body as one text.
fn joined(mut body: &str) -> String {
    let mut out = String::new();
    loop {
        let (length, rest) = body.split_once("\r\n").expect("a chunk");
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            return out;
        }
        out.push_str(&rest[..length]);
        body = rest[length..].strip_prefix("\r\n").expect("the end of a chunk");
    }
}

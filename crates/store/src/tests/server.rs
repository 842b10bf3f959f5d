//! A real etcd on loopback ports, with its data in a folder of its own.

use crate::{Etcd, EtcdConfig};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// An etcd needs about 0.3 s; a busy machine more.
const START_MAX: Duration = Duration::from_secs(30);

pub(super) struct Server {
    data: TempDir,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
    /// Flags of a server that speaks TLS.
    tls: Vec<String>,
}

impl Server {
    pub(super) fn start() -> Self {
        Self::with_tls(Vec::new())
    }

    pub(super) fn with_tls(tls: Vec<String>) -> Self {
        let mut server = Self {
            data: TempDir::new().unwrap(),
            client_port: free_port(),
            peer_port: free_port(),
            child: None,
            tls,
        };
        server.restart();
        server
    }

    pub(super) fn url(&self) -> String {
        let scheme = if self.tls.is_empty() { "http" } else { "https" };
        format!("{scheme}://127.0.0.1:{}", self.client_port)
    }

    pub(super) fn client(&self) -> Etcd {
        Etcd::new(&EtcdConfig { urls: self.url(), user: None, tls: None }).unwrap()
    }

    pub(super) fn restart(&mut self) {
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let child = Command::new("etcd")
            .args(["--name", "test", "--log-level", "error"])
            .arg("--data-dir")
            .arg(self.data.path())
            .args(["--listen-client-urls", &self.url()])
            .args(["--advertise-client-urls", &self.url()])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .args(&self.tls)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed; scripts/test installs Debian's etcd-server");
        self.child = Some(child);
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.client_port)).is_err() {
            assert!(start.elapsed() < START_MAX, "etcd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has a user `herd` with the password `right`, who may use keys under `/`, and wants a login.
    pub(super) fn enable_logins(&self) {
        // Keys and the ends of ranges are in base64: from "/" to before "0".
        let permission = r#"{"permType": "READWRITE", "key": "Lw==", "range_end": "MA=="}"#;
        for (path, body) in [
            ("role/add", r#"{"name": "herd"}"#),
            ("role/grant", &format!(r#"{{"name": "herd", "perm": {permission}}}"#)),
            ("role/add", r#"{"name": "root"}"#),
            ("user/add", r#"{"name": "root", "password": "root"}"#),
            ("user/grant", r#"{"user": "root", "role": "root"}"#),
            ("user/add", r#"{"name": "herd", "password": "right"}"#),
            ("user/grant", r#"{"user": "herd", "role": "herd"}"#),
            ("enable", "{}"),
        ] {
            self.post(&format!("/v3/auth/{path}"), body);
        }
    }

    /// A call of etcd's JSON interface; it must succeed.
    fn post(&self, path: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.client_port)).unwrap();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.split(' ').nth(1) == Some("200"), "{path} {body}: {answer}");
    }

    pub(super) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(super) fn freeze(&self) {
        self.signal("-STOP");
    }

    pub(super) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ended = child.kill();
            let _reaped = child.wait();
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

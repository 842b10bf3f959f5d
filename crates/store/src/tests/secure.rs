//! Logins and TLS, with a real etcd and certificates made for the test.

use super::server::Server;
use super::*;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

fn etcd(urls: String, password: Option<&str>, tls: Option<EtcdTls>) -> Etcd {
    let user = password.map(|password| ("herd".to_owned(), password.to_owned()));
    Etcd::new(&EtcdConfig { urls, user, tls }).unwrap()
}

/// A call that is refused, quickly; why.
async fn refusal(etcd: &Etcd) -> String {
    let quick = Duration::from_secs(5);
    let answer = tokio::time::timeout(quick, etcd.get("/a")).await.expect("no quick answer");
    match answer {
        Err(StoreError::Refused(text)) => text,
        other => panic!("not refused: {other:?}"),
    }
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_work_and_wrong_ones_are_explained() {
    let server = Server::start();
    let url = server.url();
    let early = refusal(&etcd(url.clone(), Some("right"), None)).await;
    says(&early, &[&url, "authentication is not enabled", "leave --etcd-user out"]);
    server.enable_logins();
    suite(Arc::new(etcd(url.clone(), Some("right"), None))).await;
    let behind_dead = format!("http://127.0.0.1:9,{url}");
    let first = etcd(behind_dead, Some("right"), None);
    done(&first, write("/behind-dead", None, b"1")).await;
    let wrong = refusal(&etcd(url.clone(), Some("wrong"), None)).await;
    says(&wrong, &[&url, "authentication failed", "correct --etcd-user and --etcd-password"]);
    let none = refusal(&etcd(url.clone(), None, None)).await;
    says(&none, &[&url, "give --etcd-user and --etcd-password"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_that_a_restarted_etcd_has_forgotten_is_renewed() {
    let mut server = Server::start();
    server.enable_logins();
    let etcd = etcd(server.url(), Some("right"), None);
    let first = done(&etcd, write("/a", None, b"1")).await;
    server.kill();
    server.restart();
    let mut read = etcd.get("/a").await;
    for _ in 0..100 {
        if read.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        read = etcd.get("/a").await;
    }
    assert_eq!(read.unwrap().unwrap().revision, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_works_and_wrong_certificates_are_explained() {
    let ours = Authority::new();
    let (certificate, key) = ours.sign("server");
    let flags = [
        ("--cert-file", &certificate),
        ("--key-file", &key),
        ("--trusted-ca-file", &ours.path("ca.pem")),
    ];
    let mut flags: Vec<String> =
        flags.into_iter().flat_map(|(flag, path)| [flag.into(), path.clone()]).collect();
    flags.push("--client-cert-auth".into());
    let server = Server::with_tls(flags);
    let url = server.url();

    let (certificate, key) = ours.sign("client");
    let identity = Some((read(&certificate), read(&key)));
    let ca = read(&ours.path("ca.pem"));
    let good = EtcdTls { ca: ca.clone(), identity: identity.clone() };
    let behind_dead = format!("https://127.0.0.1:9,{url}");
    suite(Arc::new(etcd(behind_dead, None, Some(good)))).await;

    let theirs = Authority::new();
    let wrong = EtcdTls { ca: read(&theirs.path("ca.pem")), identity };
    let text = refusal(&etcd(url.clone(), None, Some(wrong))).await;
    says(&text, &[&url, "invalid peer certificate", "correct --etcd-ca"]);

    let (certificate, key) = theirs.sign("client");
    for identity in [None, Some((read(&certificate), read(&key)))] {
        let tls = EtcdTls { ca: ca.clone(), identity };
        let text = refusal(&etcd(url.clone(), None, Some(tls))).await;
        says(&text, &[&url, "give --etcd-cert and --etcd-key"]);
    }

    let bare = EtcdConfig { urls: url.clone(), user: None, tls: None };
    let text = Etcd::new(&bare).err().expect("no authority is known").to_string();
    says(&text, &[&url, "give --etcd-ca"]);

    let plain = Server::start();
    let tls = EtcdTls { ca, identity: None };
    let url = plain.url().replace("http://", "https://");
    says(&refusal(&etcd(url, None, Some(tls))).await, &["use http://"]);
}

/// A certificate authority in a folder of its own.
struct Authority(TempDir);

impl Authority {
    fn new() -> Self {
        let authority = Self(TempDir::new().unwrap());
        let (ca, key) = (authority.path("ca.pem"), authority.path("ca.key"));
        let subject = ["-subj", "/CN=test authority", "-days", "2"];
        let new =
            ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        openssl(new.into_iter().chain(subject).chain(["-keyout", &key, "-out", &ca]));
        authority
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// The files of a certificate for this host, and of its key.
    fn sign(&self, name: &str) -> (String, String) {
        let file = |end: &str| self.path(&format!("{name}.{end}"));
        let (request, certificate, key, more) =
            (file("csr"), file("pem"), file("key"), file("ext"));
        let new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        let subject = ["-subj", "/CN=herd", "-keyout", &key, "-out", &request];
        openssl(new.into_iter().chain(subject));
        std::fs::write(&more, "subjectAltName=IP:127.0.0.1\n").unwrap();
        let (ca, ca_key) = (self.path("ca.pem"), self.path("ca.key"));
        let sign = ["x509", "-req", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-days", "2"];
        let out = ["-CAcreateserial", "-extfile", &more, "-out", &certificate];
        openssl(sign.into_iter().chain(out));
        (certificate, key)
    }
}

fn openssl<'a>(args: impl Iterator<Item = &'a str>) {
    let done = Command::new("openssl").args(args).output().expect("openssl is installed");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn read(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(path)).unwrap()
}

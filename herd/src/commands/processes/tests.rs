//! What `herd up --processes` was told reaches the roles, by their own parsers.

use super::*;
use crate::commands::{
    coordinator as coordinator_role, router as router_role, worker as worker_role,
};
use clap::parser::ValueSource;
use clap::{Args as _, Command, FromArgMatches};

const MODEL: &str = "/models/seven";

/// Every flag that it shares with a role, with a value that is nobody's default.
const UP: &[&str] = &[
    "--model=/models/seven",
    "--name=seven",
    "--listen=127.0.0.1:1",
    "--step-tokens=300",
    "--prefill-ms=70",
    "--queue=9",
    "--step-max-s=3.5",
    "--drain-max-s=4",
    "--threads=3",
    "--dtype=f32",
    "--device=cuda:1",
    "--kernel-cache=/kernels",
    "--gpu-limit-s=2",
    "--memory-mib=5000",
    "--kv-mib=600",
    "--backup-mib=70",
    "--sequences=12",
    "--workers=6",
    "--redundancy=2",
    "--spare-experts=5",
    "--repair-s=8",
    "--rebalance-s=11",
    "--etcd=http://e:1",
    "--etcd-user=u",
    "--etcd-password=p",
    "--etcd-ca=/ca",
    "--etcd-cert=/cert",
    "--etcd-key=/key",
    "--routers=2",
    "--processes",
];

/// Not as flags: logins of etcd are for nobody to see, what makes the links adds the chaos, and the places are
/// the test's own.
const OTHERWISE: &[&str] = &[
    "listen",
    "allow_chaos",
    "etcd",
    "etcd_user",
    "etcd_password",
    "etcd_ca",
    "etcd_cert",
    "etcd_key",
];

/// Checks that the role reads what `up` was told, of every flag that both have.
fn check(role: &Role, reads: Command) {
    let writes = Args::augment_args(Command::new("up"));
    let told = writes.clone().no_binary_name(true).get_matches_from(UP);
    let flags = reads.clone().no_binary_name(true).try_get_matches_from(&role.args[1..]);
    let read = flags.unwrap_or_else(|error| panic!("{}: {error}", role.name));
    let mut shared = 0;
    for id in reads.get_arguments().map(|argument| argument.get_id().as_str()) {
        if !writes.get_arguments().any(|other| other.get_id() == id) || OTHERWISE.contains(&id) {
            continue;
        }
        assert_eq!(told.value_source(id), Some(ValueSource::CommandLine), "{id} is not tested");
        let raw = |matches: &clap::ArgMatches| -> Vec<OsString> {
            matches.get_raw(id).into_iter().flatten().map(ToOwned::to_owned).collect()
        };
        assert_eq!(raw(&read), raw(&told), "{id} of {}", role.name);
        shared += 1;
    }
    assert!(4 < shared, "{}: {shared}", role.name);
}

fn args() -> Args {
    let told = Args::augment_args(Command::new("up")).no_binary_name(true).get_matches_from(UP);
    Args::from_arg_matches(&told).unwrap()
}

#[test]
fn flags_reach_the_router() {
    let places = (("http://c:1", "http://e:1"), (Path::new(MODEL), "127.0.0.1:1"));
    let role = router(&args(), &"herd".into(), places.0, places.1);
    check(&role, router_role::Args::augment_args(Command::new("router")));
    let password = ("HERD_ETCD_PASSWORD", OsString::from("p"));
    assert!(role.environment.contains(&password), "{:?}", role.environment);
}

#[test]
fn flags_reach_the_coordinators() {
    let (roles, urls) = coordinators(&args(), &"herd".into(), "http://e:1").unwrap();
    assert_eq!((roles.len(), urls.split(',').count()), (COORDINATORS, COORDINATORS));
    for role in &roles {
        check(role, coordinator_role::Args::augment_args(Command::new("coordinator")));
    }
}

#[test]
fn flags_reach_the_workers() {
    let args = args();
    let memory = args.compute.memory(args.workers).unwrap();
    let of = (&args, memory, Path::new("/data"));
    let role = worker(of, &"herd".into(), "http://c:1", (Path::new(MODEL), 4));
    check(&role, worker_role::Args::augment_args(Command::new("worker")));
}

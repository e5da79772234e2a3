use registry::lease::MassLoss;

use super::*;

#[track_caller]
fn check(text: &str, expect: &[&str]) {
    let mut told = Config::parse("istiod.yaml", text).map_or_else(|mistakes| mistakes, |_| Vec::new());
    // Said of every file without it; it has a test of its own.
    told.retain(|mistake| !mistake.contains("xds.advertise: is required"));
    assert_eq!(told.len(), expect.len(), "{told:#?}");
    for (told, expect) in told.iter().zip(expect) {
        assert!(told.starts_with(expect), "{told}\n  should begin with\n{expect}");
    }
}

#[test]
fn the_documented_settings_are_read() {
    let documented: String = include_str!("../config.rs")
        .lines()
        .skip_while(|l| !l.starts_with("//! ```yaml"))
        .skip(1)
        .take_while(|l| !l.starts_with("//! ```"))
        .map(|l| format!("{}\n", l.trim_start_matches("//! ")))
        .collect();
    let config = Config::parse("f", &documented).unwrap();
    assert_eq!(config.advertise.as_deref(), Some("istiod.example.com:15012"));
    assert_eq!(config.lifetimes.max, Duration::from_secs(2160 * 3600));
    assert_eq!(config.push_workers, 2);
    assert_eq!(config.consensus, Consensus::default());
}

#[test]
fn the_defaults_are_those_that_the_reference_names() {
    let defaults = Config::defaults("/d".into());
    let defaults = Config { advertise: Some("a:1".to_owned()), ..defaults };
    assert_eq!(Config::parse("f", "dataDir: /d\nxds: {advertise: 'a:1'}").unwrap(), defaults);
    let mut text = "dataDir: /d\n".to_owned();
    let mut section = "";
    for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
        let (here, name) = setting.name.split_once('.').unwrap_or(("", setting.name));
        if here != section {
            section = here;
            text.push_str(&format!("{here}:\n"));
        }
        let indent = if here.is_empty() { "" } else { "  " };
        text.push_str(&format!("{indent}{name}: {}\n", setting.default));
        if setting.name == "xds.address" {
            text.push_str("  advertise: a:1\n");
        }
    }
    assert_eq!(Config::parse("f", &text).unwrap(), defaults, "{text}");
}

#[test]
fn the_settings_in_force_are_a_file_that_gives_them() {
    let mut config = Config::defaults("/data: \"odd\"".into());
    config.advertise = Some("mesh.example.org:15012".to_owned());
    config.ca_directory = Some("/etc/ca".into());
    config.lifetimes.default = Duration::from_secs(20);
    config.dormancy = Duration::ZERO;
    config.debounce.quiet = Duration::from_millis(15);
    config.log_level = "info,xds=debug".to_owned();
    config.log_json = true;
    config.admin_names = vec!["mesh.example.org".to_owned(), "10.0.0.1".to_owned()];
    config.silence.remove_after = Duration::from_secs(90);
    config.silence.mass_loss =
        MassLoss { share: 35, window: Duration::from_secs(45), least: 7, hold: Duration::from_secs(3600) };
    config.rates.guesses = Rate { per_second: 1, burst: 7 };
    config.consensus.least_free_bytes = 0;
    config.folders = vec!["/etc/mesh: \"odd\"".into()];
    let text = config.to_string();
    assert_eq!(Config::parse("f", &text).unwrap_or_else(|m| panic!("{m:?}\n{text}")), config);
}

#[test]
fn all_mistakes_are_told_together_with_their_places() {
    check(
        "memberId: 0\nxds:\n  adress: 1\n  address: nowhere\nraft: 7\nca:\n  leafLifetime: 5 minutes\ndata_dir: x\n",
        &[
            "istiod.yaml: dataDir: is required, for example /var/lib/istiod",
            "istiod.yaml:1:11: memberId: must be a whole number from 1, this is \"0\"",
            "istiod.yaml:3:3: xds.adress: no such setting; there are: xds.address, xds.advertise",
            "istiod.yaml:4:12: xds.address: must be an IP address and a port",
            "istiod.yaml:5:7: raft: must be a map of settings, this is the number 7",
            "istiod.yaml:7:17: ca.leafLifetime: must be a duration such as 10ms",
            "istiod.yaml:8:1: data_dir: no such setting; is it dataDir?",
        ],
    );
}

#[test]
fn contradictions_are_told() {
    check(
        "dataDir: /d\nca: {leafLifetime: 100d, dormancy: 31d}\npush: {debounceQuiet: 2s}\nraft: {heartbeat: 900ms}\nadmin: {address: 0.0.0.0:15012, tls: false}\n",
        &[
            "istiod.yaml:2:20: ca.leafLifetime: must not be longer than ca.maxLeafLifetime: 100d is more than 90d",
            "istiod.yaml:2:36: ca.dormancy: must be at most 30d, this is 31d",
            "istiod.yaml:3:23: push.debounceQuiet: must not be longer than push.debounceLongest: 2s is more than 1s",
            "istiod.yaml:4:19: raft.heartbeat: must be at most a third of raft.electionTimeout",
            "istiod.yaml:5:18: admin.address: must differ from xds.address, both are 0.0.0.0:15012",
            "istiod.yaml:5:38: admin.tls: false is only possible on loopback, not on 0.0.0.0:15012",
        ],
    );
}

#[test]
fn odd_files_are_told_and_not_guessed_at() {
    check(
        "- a\n",
        &["istiod.yaml: dataDir: is required", "istiod.yaml:1:1: must be a map of settings, this is a list"],
    );
    let check = |text: &str, expect: &str| check(&format!("dataDir: /d\n{text}"), &[expect]);
    check("log: {level: '=='}\n", "istiod.yaml:2:14: log.level: must be a level such as info");
    check("log: {format: [json]}\n", "istiod.yaml:2:15: log.format: must be one value, this is a list");
    check("xds: {advertise: host}\n", "istiod.yaml:2:18: xds.advertise: must be a host and a port");
    check("---\nmemberId: 2\n", "istiod.yaml:3:1: must be one document");
    check("admin: {callBurst: 0}\n", "istiod.yaml:2:20: admin.callBurst: must be a whole number from 1");
    check("raft: {answerWithin: 0s}\n", "istiod.yaml:2:22: raft.answerWithin: must be at least 10ms");
    let share = "workloads.massLossShare: must be a share in percent, from 1 to 100";
    check("workloads: {massLossShare: 0}\n", &format!("istiod.yaml:2:28: {share}, this is \"0\""));
    check("workloads: {massLossShare: 101%}\n", &format!("istiod.yaml:2:28: {share}, this is \"101%\""));
    check("workloads: {massLossHold: 0s}\n", "istiod.yaml:2:27: workloads.massLossHold: must be at least 1s");
    check(
        "workloads: {removeAfter: 50s, massLossWindow: 1m}\n",
        "istiod.yaml:2:47: workloads.massLossWindow: must not be longer than workloads.removeAfter: 1m is more than 50s",
    );
    assert!(
        Config::parse("f", "dataDir: /d\nxds: {advertise: 'a:1'}\nworkloads: {removeAfter: 50s}\n").is_ok()
    );
    check("trustDomain: UPPER\n", "istiod.yaml:2:14: trustDomain: must be a trust domain");
    assert!(Config::parse("f", "dataDir: /d\nraft:\nxds:\n  advertise: a:1\n  address:\n").is_ok());
}

#[test]
fn raft_times_become_ticks() {
    let text = "dataDir: /d\nxds: {advertise: 'a:1'}\nraft: {heartbeat: 50ms, electionTimeout: 500ms}\n";
    let settings = Config::parse("f", text).unwrap().raft(1);
    assert_eq!((settings.tick, settings.election_ticks), (Duration::from_millis(25), 20));
    let usual = Config::defaults("/d".into()).raft(1);
    assert_eq!(usual, raft::node::Settings::new(1, 1));
}

#[test]
fn a_member_with_an_open_admin_api_stays_on_loopback() {
    let dev = |admin: &str| Dev {
        data_dir: "/x".into(),
        admin: admin.parse().unwrap(),
        xds: "127.0.0.1:0".parse().unwrap(),
        metrics: "127.0.0.1:0".parse().unwrap(),
        leaf_lifetime: Duration::from_secs(20),
        dormancy: Duration::from_secs(60),
        lease: Duration::from_secs(60),
        sources: None,
    };
    assert!(Config::dev(dev("127.0.0.1:0")).is_ok());
    assert!(Config::dev(dev("0.0.0.0:0")).is_err());
}

#[test]
fn join_tokens_never_tell_agents_to_call_an_unspecified_address() {
    for (xds, good) in [
        ("{}", false),
        ("{address: '[::]:15012'}", false),
        ("{address: '10.0.0.1:15012'}", true),
        ("{advertise: 'istiod.example.com:15012'}", true),
    ] {
        let told = Config::parse("f", &format!("dataDir: /d\nxds: {xds}\n"));
        assert_eq!(told.is_ok(), good, "{xds}: {told:?}");
    }
}

#[test]
fn lists_are_read_and_their_mistakes_are_told() {
    let text = "dataDir: /d\nxds: {advertise: 'm.example:15012'}\nadmin: {names: [a.example, 10.0.0.1]}\nsources: {files: /etc/mesh}\n";
    let config = Config::parse("f", text).unwrap();
    assert_eq!(config.folders, [PathBuf::from("/etc/mesh")]);
    assert_eq!(config.names(), ["10.0.0.1", "127.0.0.1", "a.example", "m.example"]);
    check(
        "dataDir: /d\nadmin: {names: [a b, 1]}\n",
        &[
            "istiod.yaml:2:17: admin.names: must be a DNS name or an IP address",
            "istiod.yaml:2:22: admin.names: must be a list of texts",
        ],
    );
}

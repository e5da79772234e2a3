//! A control plane of processes on loopback: founded, joined, written to, killed, damaged and mended.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::toy::now;

/// A loaded machine may be slow; nothing waits this long otherwise.
const PATIENCE: Duration = Duration::from_secs(120);

const ROUTE: &str =
    r"{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: NAME}, spec: {host: a}}";

struct Member {
    folder: PathBuf,
    address: String,
    process: Option<Child>,
}

struct Cluster {
    folder: tempfile::TempDir,
    members: BTreeMap<u8, Member>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in self.members.values_mut() {
            member.kill();
        }
    }
}

/// An address of loopback that is this process's alone, so that fixed ports are free there.
fn address(machine: u8) -> String {
    let pid = std::process::id();
    format!("127.{}.{}.{}", 64 + machine, (pid >> 8) & 0xff, (pid & 0xff).max(1))
}

impl Member {
    fn config(&self) -> PathBuf {
        self.folder.join("istiod.yaml")
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn write_config(&self) {
        let ip = &self.address;
        let text = format!(
            "dataDir: {}\nname: m-{ip}\npeers: {{address: '{ip}:15019', advertise: '{ip}:15019'}}\n\
             xds: {{address: '{ip}:15012'}}\nadmin: {{address: '{ip}:15080', tls: false}}\n\
             metrics: {{address: '{ip}:15014'}}\n\
             raft: {{electionTimeout: 600ms, heartbeat: 100ms, snapshotEntries: 60, answerWithin: 10s}}\n\
             log: {{level: info}}\n",
            self.data().display()
        );
        std::fs::write(self.config(), text).expect("writes");
    }

    fn start(&mut self, ticket: Option<&str>) {
        let log = std::fs::File::options().append(true).create(true).open(self.folder.join("log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_istiod"));
        command.args(["run", "--config"]).arg(self.config());
        if let Some(ticket) = ticket {
            command.args(["--join", ticket]);
        }
        let log = log.expect("opens");
        self.process = Some(command.stdout(Stdio::null()).stderr(log).spawn().expect("starts"));
    }

    /// `kill -9`, of this process alone.
    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("kills");
            process.wait().expect("ends");
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Status and body of a call; nothing if nobody answers.
    fn call(&self, method: &str, path: &str, body: &str) -> Option<(u16, Value)> {
        let token = std::fs::read_to_string(self.data().join("operator/admin-token")).ok()?;
        let mut socket = TcpStream::connect(format!("{}:15080", self.address)).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        let request = format!(
            "{method} /api/v1{path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.address,
            token.trim(),
            body.len()
        );
        socket.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let status = answer.get(9..12)?.parse().ok()?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let from = body.find(['{', '[']).unwrap_or(body.len());
        let to = body.rfind(['}', ']']).map_or(from, |at| at + 1);
        Some((status, serde_json::from_str(body.get(from..to)?).unwrap_or(Value::Null)))
    }

    /// What it says of itself to whoever asks whether it is ready; nothing if nobody answers.
    fn readiness(&self) -> Option<(u16, String)> {
        let mut socket = TcpStream::connect(format!("{}:15014", self.address)).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        socket.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.get(9..12)?.parse().ok()?, body.to_owned()))
    }

    /// Number and part of every member, as this one sees them.
    fn parts(&self) -> BTreeMap<u64, String> {
        let Some((200, list)) = self.call("GET", "/members", "") else { return BTreeMap::new() };
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let part = |item: &Value| Some((item["id"].as_u64()?, item["part"].as_str()?.to_owned()));
        items.iter().filter_map(part).collect()
    }

    fn leader(&self) -> Option<u64> {
        self.parts().into_iter().find(|(_, part)| part == "leader").map(|(id, _)| id)
    }
}

impl Cluster {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("makes a folder"), members: BTreeMap::new() }
    }

    fn machine(&mut self, number: u8) -> &mut Member {
        let folder = self.folder.path().join(number.to_string());
        std::fs::create_dir_all(&folder).expect("makes a folder");
        let member = Member { folder, address: address(number), process: None };
        self.members.insert(number, member);
        self.members.get_mut(&number).expect("was just put there")
    }

    fn logs(&self) -> String {
        let mut text = String::new();
        for (number, member) in &self.members {
            let log = member.log();
            let lines: Vec<&str> = log.lines().collect();
            text.push_str(&format!("--- machine {number}\n"));
            text.push_str(&lines[lines.len().saturating_sub(25)..].join("\n"));
            text.push('\n');
        }
        text
    }

    /// Asks until the answer is there.
    fn until<T>(&self, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
        let deadline = now() + PATIENCE;
        loop {
            if let Some(found) = ask() {
                return found;
            }
            assert!(now() < deadline, "{what} did not happen in time\n{}", self.logs());
            std::thread::park_timeout(Duration::from_millis(30));
        }
    }

    fn grow(&mut self, number: u8, via: u8) {
        let asked = json!({"voter": true, "ttlSeconds": 600}).to_string();
        let (_, answer) = self.until("a ticket", || {
            self.members[&via].call("POST", "/members", &asked).filter(|(status, _)| *status == 201)
        });
        let ticket = answer["ticket"].as_str().expect("is a ticket").to_owned();
        let member = self.machine(number);
        member.write_config();
        member.start(Some(&ticket));
    }

    fn voters(&self, via: u8) -> Vec<u64> {
        let votes = |part: &String| part == "voter" || part == "leader";
        self.members[&via].parts().into_iter().filter(|(_, part)| votes(part)).map(|(id, _)| id).collect()
    }

    /// Writes an object through a machine until it is acknowledged.
    fn write(&self, via: u8, name: &str) {
        let files = json!([{"name": "test.yaml", "text": ROUTE.replace("NAME", name)}]);
        let body = json!({"files": files}).to_string();
        self.until("a write", || {
            let answer = self.members[&via].call("POST", "/apply", &body);
            answer.filter(|(status, _)| *status == 200)
        });
    }

    fn has(&self, via: u8, name: &str) -> bool {
        let path = format!("/config/destinationrule/default/{name}");
        matches!(self.members[&via].call("GET", &path, ""), Some((200, _)))
    }
}

fn damage(data: &Path) {
    let log = data.join("raft/log");
    let mut names: Vec<_> =
        std::fs::read_dir(&log).expect("reads").map(|f| f.expect("reads").path()).collect();
    names.sort();
    let path = names.first().expect("has a segment");
    let mut bytes = std::fs::read(path).expect("reads");
    // In the middle of what was synced long ago: no crash writes such a thing.
    let used = bytes.iter().rposition(|byte| *byte != 0).expect("is not empty");
    bytes[used / 2] ^= 0x40;
    std::fs::write(path, bytes).expect("writes");
}

#[test]
fn three_processes_are_founded_joined_killed_damaged_and_mended() {
    let mut cluster = Cluster::new();
    let first = cluster.machine(1);
    let (config, data, address) = (first.config(), first.data(), first.address.clone());
    let init = Command::new(env!("CARGO_BIN_EXE_istiod"))
        .args(["init", "--peer", &format!("{address}:15019"), "--xds", &format!("{address}:15012")])
        .arg("--config")
        .arg(&config)
        .arg("--data-dir")
        .arg(&data)
        .stderr(Stdio::null())
        .status();
    assert!(init.expect("runs").success());
    assert!(std::fs::read_to_string(&config).expect("is there").contains("advertise"));
    first.write_config();
    first.start(None);
    cluster.until("the founder leads", || (cluster.voters(1) == [1]).then_some(()));

    // One becomes three, and never two.
    cluster.grow(2, 1);
    cluster.grow(3, 2);
    cluster.until("three vote", || {
        let voters = cluster.voters(1);
        assert_ne!(voters.len(), 2, "two voters");
        (voters.len() == 3 && cluster.voters(3).len() == 3).then_some(())
    });
    let root = |number: u8| std::fs::read(cluster.members[&number].data().join("root-cert.pem"));
    assert!([2, 3].iter().all(|number| root(*number).ok() == root(1).ok()), "all issue from one root");

    // Every member takes writes, and has them when it has answered.
    for via in [1, 2, 3] {
        cluster.write(via, &format!("w{via}"));
        assert!(cluster.has(via, &format!("w{via}")));
    }

    // Refusals, with the reason.
    for (path, body, status, reason) in [
        ("/members/remove", json!({"ids": [2]}), 409, "1, 3 or 5 members vote, this would leave 2"),
        ("/members/remove", json!({"ids": [1, 2, 3]}), 409, "the last voter cannot go"),
        ("/members/promote", json!({"ids": [9]}), 404, "there is no member 9"),
        ("/members/transfer", json!({"to": 9}), 404, "there is no member 9"),
    ] {
        let (found, problem) = cluster.members[&2].call("POST", path, &body.to_string()).expect("answers");
        assert_eq!(found, status, "{path} {body}: {problem}");
        assert!(problem["detail"].as_str().unwrap_or_default().contains(reason), "{problem}");
    }

    // The leader is killed: the others go on, and it comes back.
    let leader = cluster.until("a leader", || cluster.members[&1].leader());
    let killed = u8::try_from(leader).expect("is small");
    let survivor = if killed == 1 { 2 } else { 1 };
    cluster.members.get_mut(&killed).expect("runs").kill();
    let before: Instant = now();
    cluster.write(survivor, "after-the-kill");
    println!("a write {} ms after the leader was killed", before.elapsed().as_millis());
    cluster.members.get_mut(&killed).expect("is there").start(None);
    cluster.until("it comes back", || cluster.has(killed, "after-the-kill").then_some(()));

    // Another one leads on request.
    let asked = json!({"to": leader}).to_string();
    let (status, problem) =
        cluster.members[&survivor].call("POST", "/members/transfer", &asked).expect("answers");
    assert_eq!(status, 204, "{problem}");

    // A damaged log is told, moved aside, and rebuilt from the peers under a new number.
    let hurt = survivor;
    cluster.members.get_mut(&hurt).expect("runs").kill();
    for number in 0..10 {
        cluster.write(killed, &format!("meanwhile{number}"));
    }
    damage(&cluster.members[&hurt].data());
    cluster.members.get_mut(&hurt).expect("is there").start(None);
    cluster.until("it is rebuilt", || {
        let voters = cluster.voters(killed);
        (voters.contains(&4) && voters.len() == 3 && cluster.has(hurt, "meanwhile9")).then_some(())
    });
    assert!(cluster.members[&hurt].data().join("raft.damaged-1").is_dir());
    assert!(cluster.members[&hurt].log().contains("data is damaged"));
    assert!(!cluster.voters(killed).contains(&u64::from(hurt)), "its old number is gone");

    is_ready_with_the_others(&mut cluster, killed);
}

/// A member that cannot know what is committed is not ready, and says why; with the others it is.
fn is_ready_with_the_others(cluster: &mut Cluster, first: u8) {
    for number in [1, 2, 3] {
        cluster.members.get_mut(&number).expect("is there").kill();
    }
    cluster.members.get_mut(&first).expect("is there").start(None);
    let waiting = "not ready: what was committed before it started is not applied here yet\n";
    cluster.until("it says what it waits for", || {
        let (status, why) = cluster.members[&first].readiness()?;
        assert_eq!(status, 503, "{why}");
        (why == waiting).then_some(())
    });
    assert!(cluster.members[&first].call("GET", "/members", "").is_none(), "it serves nobody");
    for number in [1, 2, 3].into_iter().filter(|number| *number != first) {
        cluster.members.get_mut(&number).expect("is there").start(None);
    }
    cluster.until("it is ready", || (cluster.members[&first].readiness()?.0 == 200).then_some(()));
    assert!(cluster.has(first, "meanwhile9"), "what was committed is here");
}

//! Logs of this version of commands and of the one before, byte for byte: every member makes the same of them, whether
//! it applied all of it, began from a snapshot, or came back from its store in the middle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use ca::authn::Hash;
use ca::node::Revocation;
use ca::state::{CaCommand, TokenRecord};
use istiod::access::{AccessCommand, ApiToken, Binding, Grant, Role};
use istiod::audit::{AuditCommand, Origin, Retention};
use istiod::cluster::{ClusterCommand, Description, TicketRecord};
use istiod::publish::Publisher;
use istiod::raft::machine::{Halt, StateMachine as _};
use istiod::raft::state_machine::VERSION;
use istiod::raft::{Command, Mesh, Outcome};
use registry::state::{Batch, Command as Change, Presence, State, StoredCommand, WorkloadKey};

use crate::mesh::{ROUTE, batch, origin, registration, unhex};
use crate::toy::now;

fn text(text: &str) -> String {
    text.to_owned()
}

fn registry(changes: Vec<Change>) -> Command {
    Command::Registry(Batch { time_ms: 1_800_000_000_000, author: text("ann"), commands: changes })
}

/// Every kind of command of version 1.
fn version_1() -> Vec<(Command, Option<Origin>)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../registry/tests/state/log-v1.json");
    let golden = StoredCommand::decode(&std::fs::read(golden).expect("is there")).expect("decodes");
    let (secret_hash, key_hash) = (Hash::of(b"secret"), Hash::of(b"key"));
    let token = |id: &str, uses_left| TokenRecord {
        id: text(id),
        hash: secret_hash,
        namespace: text("shop"),
        service_account: text("pay"),
        expires_at: 1_800_000_900,
        uses_left,
        workload_group: None,
        created_by: text("ann"),
        redeemed_by: BTreeMap::new(),
        cidrs: Vec::new(),
    };
    let redeem = CaCommand::Redeem { id: text("t1"), secret_hash, key_hash, at: 1_800_000_000 };
    let late =
        CaCommand::Redeem { id: text("t1"), secret_hash, key_hash: Hash::of(b"other"), at: 1_800_000_001 };
    let commands = vec![
        Command::Registry(golden),
        Command::Registry(batch(ROUTE, 1_800_000_000_000)),
        Command::Ca(CaCommand::AddJoinToken(token("t1", 1))),
        Command::Ca(CaCommand::AddJoinToken(token("t2", 2))),
        Command::Join { redeem, register: registration("vm-1") },
        Command::Join { redeem: late, register: registration("vm-2") },
        Command::Ca(CaCommand::RevokeJoinToken { id: text("t2") }),
        registry(vec![Change::SetHistoryLimit { entries: 100 }]),
        Command::Ca(CaCommand::Prune { before: 1_800_000_901 }),
    ];
    commands.into_iter().map(|command| (command, None)).collect()
}

/// Every kind of command that version 2 added.
fn version_2() -> Vec<(Command, Option<Origin>)> {
    let description = |name: &str| Description {
        name: text(name),
        peer: format!("{name}:15019"),
        xds: format!("{name}:15012"),
        admin: format!("{name}:15080"),
        program: text("0.1.0"),
        reads: 2,
    };
    let cluster = |command| (Command::Cluster(command), None);
    let (secret, instance) = (Hash::of(b"ticket"), Hash::of(b"machine"));
    let ticket =
        TicketRecord { secret, expires_at: 1_800_000_900, wants_vote: true, replaces: None, redeemed: None };
    let enrol = ClusterCommand::Enrol {
        ticket: text("k1"),
        secret,
        instance,
        description: description("b"),
        now: 1_800_000_000,
    };
    let grant = Grant { role: Role::Editor, namespaces: Some([text("shop")].into()) };
    let token = ApiToken {
        id: text("a1"),
        hash: Hash::of(b"api"),
        name: text("ci"),
        grant: grant.clone(),
        created_at: 1_800_000_000,
        expires_at: 1_800_086_400,
        created_by: text("ann"),
        last_used: None,
    };
    let binding = Binding {
        identity: text("spiffe://cluster.local/ns/ops/sa/bot"),
        grant,
        created_at: 1_800_000_000,
        created_by: text("ann"),
    };
    let changed = ROUTE.replace("subset: v1", "subset: v2");
    vec![
        cluster(ClusterCommand::Found { id: 1, description: description("a") }),
        cluster(ClusterCommand::Seal { name: text("root"), sealed: text("c2VhbGVk") }),
        cluster(ClusterCommand::AddTicket { id: text("k1"), ticket: ticket.clone() }),
        cluster(ClusterCommand::AddTicket { id: text("k2"), ticket }),
        cluster(enrol),
        cluster(ClusterCommand::Describe { id: 1, description: description("aa") }),
        cluster(ClusterCommand::Reenrol {
            old: 2,
            instance: Hash::of(b"new"),
            description: description("b"),
        }),
        cluster(ClusterCommand::Change { expected: [1].into(), voters: [1].into(), remove: BTreeSet::new() }),
        cluster(ClusterCommand::RevokeTicket { id: text("k2") }),
        cluster(ClusterCommand::Prune { before: 1_800_000_901 }),
        (Command::Access(AccessCommand::AddToken(token)), Some(origin(1))),
        (Command::Access(AccessCommand::Bind(binding)), Some(origin(2))),
        (Command::Access(AccessCommand::Used { ids: [text("a1")].into(), at: 1_800_003_600 }), None),
        (Command::Audit(AuditCommand::SetRetention(Retention { entries: 500, age_ms: 0 })), Some(origin(3))),
        (Command::Registry(batch(&changed, 1_800_000_001_000)), Some(origin(4))),
        (registry(vec![Change::SetHistoryRetention { entries: 50, age_ms: 86_400_000 }]), Some(origin(5))),
        (Command::Access(AccessCommand::RevokeToken { id: text("a1") }), Some(origin(6))),
    ]
}

/// Every kind of command that version 3 added.
fn version_3() -> Vec<(Command, Option<Origin>)> {
    let revoke = |node: &str, reason: &str| {
        Command::Ca(CaCommand::RevokeNode(Revocation {
            node: node.parse().expect("is a node"),
            namespace: text("shop"),
            service_account: text("pay"),
            at: 1_800_000_000,
            by: text("ann"),
            reason: text(reason),
            until: 1_810_000_000,
        }))
    };
    let mut known = registration("vm-3");
    known.commands.extend([lost(Presence::Silent), lost(Presence::Unknown)]);
    vec![
        (revoke("3a7816bf8f01cfea", "stolen"), Some(origin(7))),
        (revoke("0000000000abcdef", ""), None),
        (revoke("3a7816bf8f01cfea", "lost"), Some(origin(8))),
        (Command::Registry(known), None),
        (registry(vec![lost(Presence::Released)]), Some(origin(9))),
        (registry(vec![lost(Presence::Unknown)]), None),
    ]
}

/// What version 4 added to commands.
fn version_4() -> Vec<(Command, Option<Origin>)> {
    let key = WorkloadKey { namespace: text("shop"), name: text("vm-3") };
    let ill = Change::WorkloadHealth {
        key,
        session: text("1"),
        healthy: false,
        reason: text("GET http://10.0.0.9:80/ready: status 503"),
    };
    let mut again = registration("vm-4");
    for change in &mut again.commands {
        if let Change::RegisterWorkload { registration } = change {
            Arc::make_mut(registration).reason = text("connection refused");
        }
    }
    let token = TokenRecord {
        id: text("t3"),
        hash: Hash::of(b"secret"),
        namespace: text("shop"),
        service_account: text("pay"),
        expires_at: 1_800_009_000,
        uses_left: 1,
        workload_group: None,
        created_by: text("ann"),
        redeemed_by: BTreeMap::new(),
        cidrs: ["10.0.0.0/8", "2001:db8::/32"].map(|cidr| cidr.parse().expect("is a block")).into(),
    };
    vec![
        (registry(vec![ill]), None),
        (Command::Registry(again), None),
        (Command::Ca(CaCommand::AddJoinToken(token)), Some(origin(10))),
    ]
}

/// Every kind of command that a version added.
fn added_by(version: u32) -> Vec<(Command, Option<Origin>)> {
    match version {
        1 => version_1(),
        2 => version_2(),
        3 => version_3(),
        _ => version_4(),
    }
}

fn lost(presence: Presence) -> Change {
    let key = WorkloadKey { namespace: text("shop"), name: text("vm-3") };
    Change::WorkloadPresence { key, session: text("1"), presence }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A recorded log, and the hash of the state that it made when it was recorded. Never write it anew for a version that
/// was released.
struct Recorded {
    commands: Vec<Vec<u8>>,
    state: String,
}

impl Recorded {
    fn of(version: u32) -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/raft/recorded/version-{version}.hex"));
        if std::env::vars_os().any(|(name, _)| name == "UPDATE") {
            let commands: Vec<Vec<u8>> = added_by(version).iter().map(encoded).collect();
            let earlier: Vec<_> = (1..version).flat_map(|earlier| Self::of(earlier).commands).collect();
            let (state, _) = replay(&[earlier, commands.clone()].concat(), None);
            let lines: String = commands.iter().map(|command| hex(command) + "\n").collect();
            std::fs::write(&path, format!("{lines}state {}\n", Hash::of(&state))).expect("writes");
        }
        let text = std::fs::read_to_string(&path).expect("is there");
        let (commands, state) = text.trim_end().rsplit_once("\nstate ").expect("ends with the state");
        Self { commands: commands.lines().map(unhex).collect(), state: state.to_owned() }
    }
}

fn encoded((command, origin): &(Command, Option<Origin>)) -> Vec<u8> {
    let bytes = origin.as_ref().map_or_else(|| command.encode(), |origin| command.encode_as(origin));
    bytes.expect("encodes")
}

/// A member, and what its store has.
struct Member {
    mesh: Mesh,
    stored: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Member {
    fn new() -> Self {
        let (publisher, _) = Publisher::new(&State::default());
        Self { mesh: Mesh::new(publisher), stored: BTreeMap::new() }
    }

    fn apply(&mut self, index: u64, command: &[u8]) -> Result<Outcome, Halt> {
        let outcome = self.mesh.apply(index, command)?;
        for write in self.mesh.take_writes()() {
            match write.value {
                Some(value) => self.stored.insert(write.key, value),
                None => self.stored.remove(&write.key),
            };
        }
        self.mesh.publish(index, now());
        Ok(outcome)
    }

    fn encoded(&self) -> Vec<u8> {
        self.mesh.view().encode()
    }
}

/// How a member comes to have the beginning of the log without having applied it in this life.
#[derive(Debug, Clone, Copy)]
enum Way {
    Snapshot,
    Store,
}

/// The state and the outcomes after all commands, of a member that began a new life after so many of them.
fn replay(commands: &[Vec<u8>], restart: Option<(usize, Way)>) -> (Vec<u8>, Vec<Outcome>) {
    let mut member = Member::new();
    let mut outcomes = Vec::new();
    for (index, command) in (1..).zip(commands) {
        if let Some((_, way)) = restart.filter(|(after, _)| index == *after as u64 + 1) {
            let mut next = Member::new();
            match way {
                Way::Snapshot => {
                    next.mesh.restore(index - 1, &member.encoded()).expect("restores");
                    next.stored = member.stored;
                }
                Way::Store => {
                    next.mesh.load(index - 1, member.stored.clone().into_iter().collect()).expect("loads");
                    next.stored = member.stored;
                }
            }
            member = next;
        }
        outcomes.push(member.apply(index, command).expect("applies"));
    }
    (member.encoded(), outcomes)
}

#[test]
fn recorded_logs_make_the_same_state_on_every_member() {
    let mut log = Vec::new();
    for version in 1..=VERSION {
        let Recorded { commands, state } = Recorded::of(version);
        log.extend(commands);
        let (expected, outcomes) = replay(&log, None);
        assert_eq!(
            Hash::of(&expected).to_string(),
            state,
            "what version {version} made when it was recorded"
        );
        for after in 0..log.len() {
            for way in [Way::Snapshot, Way::Store] {
                let (found, again) = replay(&log, Some((after, way)));
                assert!(found == expected, "version {version}, {way:?} after {after}");
                assert_eq!(again, outcomes, "version {version}, {way:?} after {after}");
            }
        }
    }
}

#[test]
fn recorded_commands_are_read_and_written_as_they_were() {
    for version in 1..=VERSION {
        let made = added_by(version);
        let recorded = Recorded::of(version).commands;
        assert_eq!(recorded.len(), made.len());
        for (bytes, made) in recorded.iter().zip(made) {
            assert_eq!(Command::decode_as(1, bytes).expect("decodes"), made);
            assert_eq!(&encoded(&made), bytes, "today's form is the recorded one");
            let needs = made.0.version().max(if made.1.is_some() { 2 } else { 1 });
            assert_eq!(needs, version, "{made:?}");
        }
    }
}

#[test]
fn a_command_of_the_next_version_halts_every_member_at_the_same_entry_with_the_same_words() {
    let log: Vec<_> = (1..=VERSION).flat_map(|version| Recorded::of(version).commands).collect();
    let next = unhex("0805120178");
    let mut told = BTreeSet::new();
    for restart in [None, Some(Way::Snapshot), Some(Way::Store)] {
        let mut member = Member::new();
        for (index, command) in (1..).zip(&log) {
            member.apply(index, command).expect("applies");
        }
        let mut next_life = Member::new();
        let index = log.len() as u64;
        match restart {
            None => next_life = member,
            Some(Way::Snapshot) => next_life.mesh.restore(index, &member.encoded()).expect("restores"),
            Some(Way::Store) => {
                next_life.mesh.load(index, member.stored.into_iter().collect()).expect("loads");
            }
        }
        let before = next_life.encoded();
        told.insert(next_life.apply(index + 1, &next).expect_err("halts").to_string());
        assert!(next_life.encoded() == before, "nothing of it was done");
    }
    let told: Vec<String> = told.into_iter().collect();
    let [words] = told.as_slice() else { panic!("{told:?}") };
    let entry = format!("entry {}", log.len() + 1);
    for part in [entry.as_str(), "version 5", "up to 4", "upgrade this member"] {
        assert!(words.contains(part), "{part:?} is not in {words}");
    }
}

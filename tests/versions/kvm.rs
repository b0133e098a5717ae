//! A KVM guest.

use super::*;
use pageferry::dirty::TrackerKind;
use pageferry::guest::kvm::{KvmConfig, KvmGuest, pc_layout};
use pageferry::testing::{Need, require};

/// As much of a state as shows that it was put in place.
#[derive(Clone, PartialEq, prost::Message)]
struct State {
    #[prost(message, repeated, tag = "2")]
    vcpus: Vec<Registers>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Registers {
    #[prost(bytes = "vec", tag = "2")]
    regs: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    sregs: Vec<u8>,
}

fn registers(state: &[u8]) -> Vec<Registers> {
    let state: State = prost::Message::decode(state).unwrap();
    assert_eq!(state.vcpus.len(), 1);
    state.vcpus
}

fn kvm_guest() -> KvmGuest {
    KvmGuest::new(&KvmConfig {
        layout: pc_layout(32 << 20).unwrap(),
        huge: HugePages::No,
        vcpus: 1,
        program: PROGRAM,
        tracker: TrackerKind::Log,
    })
    .unwrap()
}

/// The two belong together: the machine of the description is the one that the state is of.
#[test]
fn a_kvm_guest() {
    if !require(&[Need::Kvm]) {
        return;
    }
    let config = bytes_of(&recorded("guest-kvm-config", || kvm_guest().config().unwrap(), |_| {}));
    let state = bytes_of(&recorded("guest-kvm-state", || state_after_a_while(kvm_guest()), |_| {}));
    match KvmGuest::skeleton(&config, HugePages::No, TrackerKind::Log) {
        Ok(mut guest) => {
            assert_eq!(guest.program(), PROGRAM);
            assert_eq!(guest.memory().layout(), &pc_layout(32 << 20).unwrap());
            guest.load_state(&state, Duration::from_secs(1)).unwrap();
            let (then, now) = (registers(&state), registers(&guest.save_state().unwrap()));
            assert!(!then[0].regs.is_empty() && then == now, "{then:?} {now:?}");
        }
        // Understood, by a machine that is not like the one of then.
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.contains("this host's processor lacks")
                    || text.contains("was started on a processor of"),
                "{text}"
            );
        }
    }
}

//! The program for the network of a kept lab, for embedding programs that are none themselves: see `rudder_local::helper`.

fn main() {
    rudder_local::helper::run();
}
